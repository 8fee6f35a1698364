"""One command of `jaxlm` is a function of its flags; the files group them as people use them."""
