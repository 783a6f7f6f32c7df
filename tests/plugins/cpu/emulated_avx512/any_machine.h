// Included before w4a8_cpu.cpp: every instruction set is there, AVX-512 as emulated.
#define __builtin_cpu_supports(name) 1
