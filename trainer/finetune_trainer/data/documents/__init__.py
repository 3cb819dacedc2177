"""Documents to rows of text: fetched in parallel, read by child processes whose time and memory are bounded."""
