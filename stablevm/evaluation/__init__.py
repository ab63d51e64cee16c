"""From images to numbers and a report: sets of images, networks that give features, and the commands."""
