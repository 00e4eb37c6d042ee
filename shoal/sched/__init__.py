"""What to do next: mechanism (scheduler), preferences (policies) and predictions (lengths, forecast, cost)."""
