"""What all rooms use: errors, files, options, seeds, precision, processes. Nothing here knows the method."""
