"""One optional file for each framework; none is imported unless asked for by name."""
