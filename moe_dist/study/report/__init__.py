"""What a study has shown, as a page."""
