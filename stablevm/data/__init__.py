"""Prepared data sets: what they hold, how they are written and read, and the loader that training resumes."""
