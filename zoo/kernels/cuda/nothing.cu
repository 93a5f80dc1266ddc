// What is compiled and loaded to see whether that can be done.
extern "C" __global__ void nothing() {}
