"""Models of other people: Hugging Face's folders in and out."""
