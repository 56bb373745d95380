"""FLamby's protocol for small tabular federations: what its studies state, share out, train and report."""
