#define MMFAST_ISA avx512
#include "table.h"
