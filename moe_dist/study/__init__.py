"""Studies: a grid of runs as one command, with a ledger, resume and a report."""
