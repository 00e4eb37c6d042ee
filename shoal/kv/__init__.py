"""Who holds which block of keys and values. Bookkeeping only: no tensors, no policy, no clock."""
