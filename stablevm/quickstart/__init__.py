"""The whole staircase on handwritten digits: prepare, train, sample, judge, report."""
