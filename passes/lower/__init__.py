"""From the fused graph to the plan."""
