"""From steps to tensors to tokens: batches, memory, the runner. It must not know blocks by anything but number."""
