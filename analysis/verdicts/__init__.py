"""Claims of the papers and the rules that judge them."""
