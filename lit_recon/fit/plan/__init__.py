"""What a run will take, before any of it is done."""
