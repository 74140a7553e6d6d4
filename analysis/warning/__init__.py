"""Early warning: which signal of a run's first steps tells that its reward will collapse."""
