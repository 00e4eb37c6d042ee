"""The model as arithmetic: configuration, weights, decoder, sampler. No scheduling, no files of jobs."""
