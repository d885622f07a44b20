"""Values: boxes, tensors, layouts, keys and the records that stand in a store."""
