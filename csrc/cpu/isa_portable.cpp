#define MMFAST_ISA portable
#include "table.h"
