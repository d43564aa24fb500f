"""What any report is made of: its parts, statistics, figures, pages."""
