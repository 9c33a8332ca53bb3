"""Protocols: what is drawn, what it is compared with, by which metrics; the run, and the report of its scores."""
