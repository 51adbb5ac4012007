"""One module for each library that trains with these losses; none is imported with the package."""
