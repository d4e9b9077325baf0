"""Watch: keep destinations as close behind a running guest as asked, round after round."""
