"""The tests: a folder for each room of the package, and `helpers` for what they share."""
