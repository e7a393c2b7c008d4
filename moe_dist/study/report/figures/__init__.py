"""The figures of a report: each a function of plain numbers that returns the drawing with its data as rows."""
