"""What is measured side by side: the base, our methods, and what people would use instead."""
