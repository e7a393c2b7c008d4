"""A report as a page: `model.py` says what it holds, `write.py` writes it as HTML and as Markdown with its data."""
