#define MMFAST_ISA avx2
#include "table.h"
