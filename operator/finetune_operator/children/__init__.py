"""What is created for each attempt of a job: `prepare` and `train` render it. Pure."""
