"""The command line: the commands, their options, files of options, and recipes."""
