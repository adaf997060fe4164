"""When and how the guidance branches are evaluated and combined."""
