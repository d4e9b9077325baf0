"""What a host does whose guest another host has taken over: it neither writes nor ships nor starts it."""
