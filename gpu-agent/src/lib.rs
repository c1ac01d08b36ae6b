//! gpu-agent
