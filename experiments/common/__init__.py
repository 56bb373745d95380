"""What the studies share: the command line, claims and how they are reproduced, grids of rates, federations of images, reports."""
