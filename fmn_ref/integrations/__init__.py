"""One optional file for each framework; the package imports none of them."""
