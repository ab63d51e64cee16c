"""From handwritten digits to a report in one command: prepare, train, sample, evaluate."""
