"""What rows go through between reading and rendering, one pure map a file; `chain` says the order."""
