"""The quickstart: prepare handwritten digits, train, sample, evaluate and report, in one command."""
