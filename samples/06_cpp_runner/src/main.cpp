#include <iostream>

#include "fptq_run/command.h"

int main(int count, char** words) {
  return fptq_run::RunCommand({words + 1, words + count}, *fptq_run::MachineOfHere(), std::cout, std::cerr);
}
