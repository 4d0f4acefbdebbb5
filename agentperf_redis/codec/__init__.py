"""Values as bytes, and the classes that can be stored."""
