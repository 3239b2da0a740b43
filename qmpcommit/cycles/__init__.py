"""An overlay kept or discarded again and again, and layers merged behind it."""
