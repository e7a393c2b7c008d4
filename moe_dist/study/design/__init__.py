"""What a study is: its file, its grid of points, budgets, and what they are planned to cost."""
