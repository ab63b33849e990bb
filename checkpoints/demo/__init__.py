"""The demo checkpoint that ships with duetjax; data only."""
