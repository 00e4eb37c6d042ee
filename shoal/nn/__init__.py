"""The model as arithmetic: configuration, weights, layers. It knows one step's tensors, never requests or schedules."""
