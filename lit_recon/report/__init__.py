"""What a person looks at: figures, report.html, and a table that compares runs."""
