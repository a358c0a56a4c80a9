"""W3C trace context, and spans by OpenTelemetry, which is loaded only where TRACES is on."""
