"""The command line: commands, their options, files of options, and recipes."""
