"""The verbs of the `ygglight` command that need more than the standard library; `ygglight_launcher` picks one."""
