"""report.html: what became of a job's data, as one page for people, made from report.json alone. Holds no data."""
