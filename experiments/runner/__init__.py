"""What runs the cells of any sweep: cells, records, claims, engines, progress."""
