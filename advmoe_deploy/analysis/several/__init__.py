"""Several models put to the same images and attacks: a dissection, a blend over alpha."""
